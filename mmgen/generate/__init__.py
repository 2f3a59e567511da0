"""Generation: a state machine per request over one batched backbone."""
