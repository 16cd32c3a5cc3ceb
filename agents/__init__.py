"""LLM agents that write harnesses: their model calls, their tools, and what makes a tree of files a harness."""
