"""Model files of any kind, as people have them: `sniffing` tells what a file plainly is."""
