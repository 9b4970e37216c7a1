"""What two scripts or more need; no experiment's own logic."""
