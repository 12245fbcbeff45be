"""What the methods are measured against; same contract as `recjax.models`."""
