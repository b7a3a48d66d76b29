import sys, time, types, dataclasses
sys.path[:0]=["tests/gpu","tests/emulation"]
import numpy as np
from emulate import Emulated
from random_model import random_weights
from state_parts import errors
from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.gpu.layout import Layout
from onekernel.gpu.prefill_layout import PrefillLayout
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State as ReferenceState
SMALL=Shape(hidden=512,intermediate=768,layer_types=(LINEAR,FULL,LINEAR),vocab=208,tied=True,heads=4,kv_heads=2,head_dim=256,rotary_dim=64,rope_theta=1e7,key_heads=2,value_heads=4,key_head_dim=128,value_head_dim=128,conv_kernel=4,norm_eps=1e-6,max_context=4096,mtp_layers=0,eos_token_ids=())
def go(narrow, arch, pieces, blocks=4, shared=232448, **change):
    w=random_weights(SMALL); d=Layout.plan(SMALL,208,blocks,232448)
    p=PrefillLayout.plan(d,blocks,shared,"sm_90a" if arch==900 else "sm_80",narrow=narrow); p=dataclasses.replace(p,**change)
    t=time.time(); e=Emulated(p,w,arch,max_context=1024); t1=time.time()
    n=sum(pieces); tokens=np.random.default_rng(1).integers(0,208,n).tolist()
    ref=ReferenceState.empty(SMALL); want=model.forward(Parameters.load(w,SMALL,mtp=False),ref,tokens,all_logits=True)
    at=0; got=[]
    for c in pieces: got.append(e.prefill(tokens[at:at+c],logits=True)); at+=c
    got=np.concatenate(got)
    dec=types.SimpleNamespace(shape=SMALL,gpu=types.SimpleNamespace(capability=(9,0)))
    st=types.SimpleNamespace(position=n,capacity=1024,buffer=types.SimpleNamespace(read=lambda dt,count,at=0: np.frombuffer(e.arrays["state"].tobytes()[at:at+count*np.dtype(dt).itemsize],dt)))
    err={k:[round(v,4) for v in vs] for k,vs in errors(dec,st,ref).items()}
    le=np.linalg.norm(got-want)/np.linalg.norm(want)
    print("narrow" if narrow else "wide",arch,pieces,p.plan_launch(pieces[-1],n-pieces[-1]),"logits",round(float(le),4),err,f"build {t1-t:.0f} s run {time.time()-t1:.0f} s",flush=True)
    return e
if __name__=="__main__":
    for what in sys.argv[1:]:
        eval(what)
