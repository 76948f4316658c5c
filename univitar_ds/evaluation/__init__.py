"""What a trained model can do on data it has never seen, each figure beside what guessing gives."""
