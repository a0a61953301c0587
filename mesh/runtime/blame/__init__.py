"""Evidence about models that kill their server: those that were at work, and what earlier lives saw."""
