"""The embedded language model: its weights, its forward pass, and the server that offers both over HTTP."""
