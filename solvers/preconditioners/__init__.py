"""What makes an iteration short."""
