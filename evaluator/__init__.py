"""The only holder of private data; turns outputs into scores."""
