"""Model files of any kind: recognising them (`sniffing`, `guessing`), reading their descriptions, unpacking
archives."""
