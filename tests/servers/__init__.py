"""Third-party model servers behind the mesh. Each answer is compared with the library's own (`make test-servers`)."""
