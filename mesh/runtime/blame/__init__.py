"""Evidence about models that kill their server: the models at work when a server died, and traces of killed pods."""
