"""Documents to shards, and steps to rows; numpy only."""
