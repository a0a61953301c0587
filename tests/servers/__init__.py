"""Real model servers of others behind the mesh, each answer compared with the library's own (`make test-servers`)."""
