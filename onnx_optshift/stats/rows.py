"""x."""
import torch
from onnx_optshift.geometry import MatrixRows
def observe(moments, tap, activation):
    if not torch.isfinite(activation).all():
        moments.nonfinite += 1; return
    f=tap.form
    if isinstance(f, MatrixRows):
        x=activation
        if x.ndim==1: x=x[None]
        elif f.feature_axis==-2: x=x.transpose(-1,-2)
        x=x.reshape(1,-1,tap.width)*f.scale
        for c in x.split(65536,1): moments.update(c)
    else:
        k=f.kernel; sp=activation.shape[2:]
        if len(k)==1:
            activation=activation[...,None]; k=(*k,1); st=(*f.strides,1); di=(*f.dilations,1)
            p=f.pads_for(tuple(sp)); pads=(p[0],0,p[1],0)
        else: p=f.pads_for(tuple(sp)); pads=p; st=f.strides; di=f.dilations
        x=torch.nn.functional.pad(activation,(pads[1],pads[3],pads[0],pads[2]))
        u=torch.nn.functional.unfold(x,k,dilation=di,stride=st)
        n=u.shape[0]; u=u.reshape(n,f.group,-1,u.shape[-1]).permute(1,0,3,2).reshape(f.group,-1,tap.width)
        moments.update(u)
