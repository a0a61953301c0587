"""The pod's writes to models' records, and evidence about models that kill their server: the work that was under way
when a server died, and the traces of killed pods."""
