import asyncio, grpc, pytest, numpy as np, signal
from mesh.pb import modelmesh_pb2
from tests.support import models
from tests.support.localmesh import Client, LocalMesh
ONE = np.ones((1, 1), np.float32)
async def test_again(tmp_path, etcd_server):
    async with LocalMesh(tmp_path, etcd_server, pods=2, routers=2, router_options=["--workers","1"]) as mesh:
        clients=[Client(mesh.channel(0)),Client(mesh.channel(1))]
        stop=False; n=0
        async def ask(c):
            nonlocal n
            while not stop:
                try: await c.infer("again", x=ONE, timeout=8); n+=1
                except grpc.aio.AioRpcError as e:
                    if e.code().name=="DEADLINE_EXCEEDED": return "late"
        await mesh.register("again", models.constant(0.0))
        tasks=[asyncio.create_task(ask(c)) for c in clients for _ in range(4)]
        import time
        for life in range(1,25):
            t=time.time()
            try:
              await mesh.management().unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId="again"), timeout=15)
            except grpc.aio.AioRpcError as e:
                import os
                from tests.support.localmesh import children, command
                print("HANG", e, n)
                for p in [*mesh.routers, *mesh.pods]:
                    for pid in [p.pid, *children(p.pid)]:
                        if "python" in command(pid): os.kill(pid, signal.SIGUSR2)
                await asyncio.sleep(2)
                for p in [*mesh.routers, *mesh.pods]: print(p.name, p.log.read_text()[-14000:])
                break
            await mesh.register("again", models.constant(float(life)), router=life%2)
            print(life, round(time.time()-t,2), flush=True)
        before=n
        await asyncio.sleep(3)
        print("answers in 3 s", n-before)
        for r in (0,1):
            print(await mesh.status("again", r))
            for p in mesh.pods: print((await mesh.rest("GET", f"/mesh/v1/pods/{p.name}", router=r)).json)
        stop=True
        print(await asyncio.gather(*tasks))
