"""What each part of DiPaCo is worth: the paper's comparisons in miniature."""
