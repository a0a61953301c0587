"""The way of an inference call: from its model id to a copy, and the answer back."""
