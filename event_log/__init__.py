"""The recorder: stream to ClickHouse, and the tables rebuilt from the stream."""
