"""Networks as pure functions of (parameters, images)."""
