"""The pod's writes to models' records, and evidence about models that kill their server: the models at work when a
server died, and the traces of killed pods."""
