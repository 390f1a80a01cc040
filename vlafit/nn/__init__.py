"""The model's side of the house: batches, the abstract policy, and the bricks that policies are built of."""
