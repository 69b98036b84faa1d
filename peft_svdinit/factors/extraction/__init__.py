"""From deltas to the factors of every layer: in memory, or streamed and resumable."""
