"""The compute provider `torch`: PyTorch on CUDA GPUs or the CPU, with float32 weights."""

from llorch.providers import DeviceInfo, MemoryInfo, hookimpl
from llorch.providers.array import ArrayDevice, ArrayOps, ArrayProvider


class TorchDevice(ArrayDevice):
    def __init__(self, xp, info, options):
        super().__init__(xp, info, options)
        if options.threads:
            xp.set_num_threads(options.threads)

    def empty(self, shape, dtype):
        return self.xp.empty(shape, dtype=getattr(self.xp, dtype), device=self.info.name)

    def from_host(self, array):
        return self.xp.tensor(array, device=self.info.name)

    def to_host(self, tensor):
        return tensor.cpu().numpy()

    def memory(self):
        if self.info.memory_architecture == "cpu":
            return super().memory()
        free, total = self.xp.cuda.mem_get_info(self.info.name)
        return MemoryInfo(total=total, free=free)


class TorchOps(ArrayOps):
    """The inherited operations are right; one that the module has in one call is better taken from there."""

    @hookimpl
    def swiglu(self, device, spec):
        silu = device.xp.nn.functional.silu

        def kernel(out, gate, up):
            device.xp.mul(silu(gate), up, out=out)

        return kernel


class TorchProvider(ArrayProvider):
    name = "torch"
    summary = "PyTorch on CUDA GPUs or the CPU, float32 weights"
    requires = "PyTorch: pip install torch"
    api_version = 1
    priority = 3
    module, device_type, operations_type = "torch", TorchDevice, TorchOps

    def devices(self):
        cuda = self.xp.cuda
        gpus = [DeviceInfo(f"cuda:{i}", cuda.get_device_name(i), "cuda") for i in range(cuda.device_count())]
        cpu = f"PyTorch {self.xp.__version__}, {self.xp.get_num_threads()} threads"
        return [*gpus, DeviceInfo("cpu", cpu, "cpu")]


provider = TorchProvider()
