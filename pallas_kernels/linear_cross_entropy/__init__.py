"""Loss of a frozen head and its gradient with respect to the hidden state, without the whole logits."""
