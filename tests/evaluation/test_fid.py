"""FID and Inception score against closed forms and other programs; statistics that add up; their files."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from imf import data
from imf.evaluation import fid
from imf.program import UserError


def distance(a, b):
    return fid.frechet_distance(fid.of_rows(a), fid.of_rows(b))


def with_moments(count, mean, factor, generator):
    """Rows whose sample mean and covariance are exactly `mean` and factor @ factor.T."""
    x = torch.randn(count, len(factor.T), generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov(), upper=True), x, upper=True, left=False)
    return x @ factor.T + mean


def test_frechet_distance_of_gaussians_whose_covariances_commute():
    # |m1 - m2|^2 + sum (s1 - s2)^2 for equal eigenvectors with standard deviations s1 and s2.
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    s1 = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    s2 = torch.tensor([1.0, 2.5, 0.0, 0.5, 0.7, 0.0], dtype=torch.float64)
    m1, m2 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    a = with_moments(40, m1, rotation * s1, g)
    b = with_moments(50, m2, rotation * s2, g)
    exact = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert distance(a, b) == pytest.approx(exact, abs=1e-6)
    assert distance(b, a) == pytest.approx(exact, abs=1e-6)


def test_frechet_distance_of_two_dimensional_gaussians_that_do_not_commute():
    # For 2 x 2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)), here with M = A B.
    g = torch.Generator().manual_seed(1)
    f1, f2 = torch.randn(2, 2, 2, generator=g, dtype=torch.float64)
    m = torch.zeros(2, dtype=torch.float64)
    c1, c2 = f1 @ f1.T, f2 @ f2.T
    cross = (torch.trace(c1 @ c2) + 2 * torch.linalg.det(c1 @ c2).sqrt()).sqrt()
    exact = (torch.trace(c1) + torch.trace(c2) - 2 * cross).item()
    got = distance(with_moments(30, m, f1, g), with_moments(30, m, f2, g))
    assert got == pytest.approx(exact, rel=1e-6)


def test_frechet_distance_to_itself_is_zero_though_pixels_are_constant():
    images = data.load("digits").images
    assert (
        images.flatten(1).std(0) == 0
    ).any()  # singular covariance: the case that a plain square root fails
    assert distance(images, images) < 1e-6
    moved = images + 0.5
    assert distance(images, moved) == pytest.approx(64 * 0.25, abs=1e-6)


def test_halves_of_the_digits():
    images = data.load("digits").images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert distance(images[order[:898]], images[order[898:]]) == pytest.approx(0.3, abs=0.05)
    assert distance(images[:898], images[898:]) == pytest.approx(1.2, abs=0.05)


def test_frechet_distance_refuses():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="got 3 and 2 features"):
        distance(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        distance(x, x[:1])
    with pytest.raises(ValueError, match="finite"):
        distance(x, torch.full((4, 3), float("nan")))


def test_moments_add_up_whatever_the_batches():
    # A mean far beside the deviations: a sum of x x^T would leave no digit of the covariance.
    x = 1e6 + torch.randn(101, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.cov(x.numpy(), rowvar=False)
    for sizes in ([101], [1] * 101, [50, 0, 51]):
        whole, part = fid.Moments(5), fid.Moments(5)
        for batch in x.split(sizes):
            part.update(batch)
        whole.merge(part.count, part.mean, part.scatter)
        got = whole.statistics()
        np.testing.assert_allclose(got.mean, x.mean(0).numpy(), rtol=1e-15)
        np.testing.assert_allclose(got.covariance, expected, rtol=1e-8, atol=1e-9)


def test_inception_score_of_known_distributions():
    # Sure of one of 5 classes, all alike frequent in every split: exp(KL) is 5. Always the same: 1.
    sure = torch.eye(5).repeat(400, 1) * 60
    assert fid.inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-12)
    assert fid.inception_score(sure)[0] == pytest.approx(5, rel=0.05)
    assert fid.inception_score(sure[:1].repeat(20, 1)) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(ValueError, match=r"N >= 10, got \[9, 5\]"):
        fid.inception_score(sure[:9])


def test_figures_are_those_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.image", reason="torchmetrics is not installed")
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(300, 8, generator=g), torch.randn(200, 8, generator=g) * 1.3 + 0.2

    class Given(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x.flatten(1)

    theirs = torchmetrics.fid.FrechetInceptionDistance(Given(), normalize=True, input_img_size=(1, 2, 4))
    theirs = theirs.set_dtype(torch.float64)
    for rows, is_real in ((real, True), (fake, False)):
        theirs.update(rows.reshape(-1, 1, 2, 4), real=is_real)
    assert distance(real, fake) == pytest.approx(theirs.compute().item(), rel=1e-5)


@pytest.mark.parametrize("keys", fid.KEYS)
def test_files_of_both_official_programs(tmp_path, keys):
    x = fid.of_rows(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "statistics.npz"
    np.savez(path, **dict(zip(keys, (x.mean, x.covariance), strict=True)), more=np.zeros(2))
    got = fid.load_statistics(path)
    assert np.array_equal(got.mean, x.mean) and np.array_equal(got.covariance, x.covariance)


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "statistics.npz"
    with pytest.raises(UserError, match="no such file"):
        fid.load_statistics(path)
    x = fid.of_rows(torch.randn(20, 3))
    x.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="no statistics can be read"):
        fid.load_statistics(path)
    for values, message in (
        ({"mu": x.mean}, "must hold mu and sigma or ref_mu and ref_sigma, got mu"),
        ({"mu": x.mean, "sigma": x.mean}, r"mean must be \[D\] .* got \[3\] and \[3\]"),
        ({"mu": x.mean * np.nan, "sigma": x.covariance}, "finite"),
        ({"mu": np.array([{}]), "sigma": x.covariance}, "allow_pickle=False"),
    ):
        np.savez(path, **values)
        with pytest.raises(UserError, match=message):
            fid.load_statistics(path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    x = fid.of_rows(torch.randn(20, 3))
    path = tmp_path / "statistics.npz"
    x.save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"statistics\.npz"):
        x.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_features_too_wide_for_a_covariance_are_named():
    with pytest.raises(ValueError, match="at most 16,384 wide, got 196,608, whose covariance takes 309 GB"):
        fid.Moments(3 * 256 * 256)


def test_fid_needs_neither_the_networks_nor_the_kernels():
    """The package imports the kernels for their version alone; a stand-in shows that FID needs no more."""
    program = (
        "import sys, types\n"
        "sys.modules['imf_kernels'] = types.SimpleNamespace(__version__='0')\n"
        "from imf.evaluation import fid\n"
        "print(*sorted(name for name in sys.modules if name.startswith('imf')))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found = done.stdout.split()
    assert "imf.evaluation.fid" in found
    above = ("model", "objective", "mean_flow", "networks", "sampling", "data", "official", "training")
    assert not [name for name in found if name.startswith(tuple(f"imf.{room}" for room in above))]
    assert not [name for name in found if name.startswith("imf_kernels.")]
