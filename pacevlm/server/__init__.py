"""A server that keeps latency promises: HTTP in front, a queue by deadlines, and one worker that answers."""
