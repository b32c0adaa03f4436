"""The same library without async and await."""

from agentos.sync import VM

with VM() as vm:
    print(vm.exec("echo hello from $(hostname)").stdout, end="")

    process = vm.spawn("sh", ["-c", "for n in 1 2 3; do echo $n; done"])
    for chunk in process.output():
        print(chunk.stream, chunk.data)
    print("exit code:", process.wait())

    vm.files.write_file("greeting.txt", "hi\n")
    print(vm.files.read_file("greeting.txt"))
