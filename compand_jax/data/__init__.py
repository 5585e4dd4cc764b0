"""Images: CIFAR, the digits, augmentation."""
