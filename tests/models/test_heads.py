import torch

from cheaplunch.models.heads import foreground_logit


def test_the_sigmoid_of_the_logit_is_the_softmax_of_the_two_outputs():
    outputs = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 5
    logit = foreground_logit(outputs)
    assert logit.shape == (2, 3, 4, 5)
    torch.testing.assert_close(logit.sigmoid(), outputs.softmax(dim=2)[:, :, 1])
    one = outputs[:, :, :1]
    assert torch.equal(foreground_logit(one), one[:, :, 0])  # a single output is the logit itself
