"""Model servers as their agent sees them: the child process, and the SPI that it speaks."""
