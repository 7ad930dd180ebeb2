"""What a run tells about itself: metrics, and the sinks they go to."""
