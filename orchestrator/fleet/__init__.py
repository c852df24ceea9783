"""What a fleet of GPUs can carry: fine-tunes, where each fits, a schedule, and what would change it."""
