"""Deploying Mesh: the image, and a Kubernetes on this machine to test on. No part of what is installed."""
