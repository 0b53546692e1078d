"""Published ways of making a trained model's cache smaller, rewritten from their papers' formulas, for comparisons."""
