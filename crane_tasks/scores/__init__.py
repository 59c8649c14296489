"""S, the gate: gradients, their sums, and the change of loss that they predict."""
