"""Management of models: registration, status, and explanations."""
