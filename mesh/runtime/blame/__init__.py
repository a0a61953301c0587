"""Evidence about models that kill their server: who was at work, and what earlier lives have seen."""
