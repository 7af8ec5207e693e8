import sys; sys.path.insert(0,"/work/main")
from tests.support.slurm import slurm
from tests.support.users import users
from tests.support.scratch import scratch
from tests.support import images
P=images.native_programs()
with scratch("slurm") as d, users("hpcctr-x") as (x,), slurm(d,nodes=2) as s:
  for n,(names,k) in {"one":("n1",2),"two":("n1,n2",4)}.items():
   for mpi,fam in (("pmix","openmpi"),("pmi2","mpich")):
    bad=0
    for i in range(12):
        r=s.run(["srun",f"--nodelist={names}",f"--ntasks={k}","--ntasks-per-node=2",f"--mpi={mpi}",f"{P}/{fam}/report"], user=x, check=False)
        if r.returncode: bad+=1; last=r
    print(names,mpi,"bad",bad,"of 12")
    if bad: print(last.stdout.decode(), last.stderr.decode()[-300:])
