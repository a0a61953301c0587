"""Model files of any kind: `sniffing` recognises what a file is."""
