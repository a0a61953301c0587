"""Model servers, for their agent: the child process, and the client of its SPI."""
