"""HTTP in front of a worker: V2 REST and the management API, as an aiohttp application."""
