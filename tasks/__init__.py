"""The built-in tasks, one folder each: description, public data, private data, evaluator, reference agent."""
