"""A fold of patients becomes a trained model with everything it was fitted on."""
