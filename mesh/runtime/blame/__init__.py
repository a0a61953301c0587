"""Evidence about models that kill their server: the models at work when it died, and traces of earlier lives."""
