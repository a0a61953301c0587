"""V2's messages and numpy: requests become feeds, arrays become replies."""
