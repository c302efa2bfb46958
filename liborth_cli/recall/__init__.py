"""Steps from the fine-tuned model to the losses that forget tokens would have had unseen: what `--method recall` divides by."""
