"""The conversion between V2's messages and numpy: from requests to inputs, from arrays to replies."""
