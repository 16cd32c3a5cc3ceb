"""Model providers: one adapter a kind of API, each the only file that knows its vendor's SDK."""
