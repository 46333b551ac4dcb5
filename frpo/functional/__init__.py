"""Every equation, as a pure function of tensors: ratios, estimators of KL, log-means, the worst case, likelihoods."""
