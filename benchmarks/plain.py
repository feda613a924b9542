"""The loop of the usual kind, to compare with: a file per patch, a DataLoader, lists.

Written for this comparison from what published code of the field does: Pillow decodes a JPEG and
numpy an .npz per spot and epoch, torchvision turns and normalises it alone, targets travel whole,
the optimiser is the plain one, memory contiguous, and each step brings loss and predictions to the
host.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from brstnet.training.batches import Spots
from brstnet.training.fitted import Fitted


class Quarter:
    """A turn by 90 degrees or none."""

    def __call__(self, image: Tensor) -> Tensor:
        """The image (C, H, W), maybe turned."""
        return torch.rot90(image, int(torch.randint(2, ())), (1, 2))


class PatchFiles(Dataset[tuple[Tensor, Tensor]]):
    """A folder with a JPEG and an .npz of counts a spot."""

    def __init__(self, folder: Path, fitted: Fitted) -> None:
        self.files = sorted(folder.glob("*.jpg"))
        self.mean = torch.from_numpy(fitted.genes["mean"].to_numpy(np.float32))
        self.std = torch.from_numpy(fitted.genes["std"].to_numpy(np.float32))
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                Quarter(),
                transforms.Normalize(fitted.image_mean, fitted.image_std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        file = self.files[number]
        with Image.open(file) as image:
            x = self.transform(transforms.functional.to_tensor(image.convert("RGB")))
        counts = torch.from_numpy(np.load(file.with_suffix(".npz"))["counts"])
        return x, ((torch.log1p(counts.double()) - self.mean) / self.std).float()


def write_files(folder: Path, spots: Spots, rows: np.ndarray) -> None:
    """A JPEG (quality 95) and an .npz of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        patch = spots.patches(torch.tensor([row], device=spots.device))[0].cpu().numpy()
        Image.fromarray(patch).save(folder / f"{row:06d}.jpg", quality=95)
        counts = spots.counts_NG[row].cpu().numpy().astype(np.float64)
        np.savez(folder / f"{row:06d}.npz", counts=counts)


class PlainLoop:
    """The loop, ready to take steps."""

    def __init__(
        self, folder: Path, fitted: Fitted, model: nn.Module, device: torch.device, batch: int
    ) -> None:
        workers = 8 if device.type == "cuda" else 0  # on 2 CPUs workers take from the step
        self.loader = DataLoader(
            PatchFiles(folder, fitted),
            batch_size=batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-6, foreach=False, fused=False
        )
        self.batches = iter(self.loader)
        self.losses: list[float] = []
        self.predictions: list[np.ndarray] = []
        self.measured: list[np.ndarray] = []

    def step(self, aux_weight: float) -> None:
        """One step of the epoch; after its last the next epoch begins."""
        drawn = next(self.batches, None)
        if drawn is None:
            self.predictions, self.measured = [], []
            self.batches = iter(self.loader)
            drawn = next(self.batches)
        x, y = (part.to(self.device) for part in drawn)
        main, aux, _ = self.model(x)
        genes = main.shape[1]
        loss = F.mse_loss(main, y[:, :genes])
        if aux is not None:
            loss = loss + aux_weight * F.mse_loss(aux, y[:, genes:])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.predictions.append(main.detach().cpu().numpy())
        self.measured.append(y[:, :genes].cpu().numpy())
