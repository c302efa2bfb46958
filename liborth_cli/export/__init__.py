"""What others read: model cards, adapters, task vectors."""
