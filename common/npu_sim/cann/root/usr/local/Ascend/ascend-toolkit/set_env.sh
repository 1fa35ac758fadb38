# shellcheck shell=bash
# What the set_env.sh of a real CANN sets, as far as torch_npu and the zoo look at it.
ASCEND_TOOLKIT_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/latest" && pwd)
export ASCEND_TOOLKIT_HOME
export ASCEND_HOME_PATH=$ASCEND_TOOLKIT_HOME
export ASCEND_OPP_PATH=$ASCEND_TOOLKIT_HOME/opp
export LD_LIBRARY_PATH=$ASCEND_TOOLKIT_HOME/lib64:$LD_LIBRARY_PATH
# The real CANN puts its Python packages here too; the stand-in's replace the compute kernels.
export PYTHONPATH=$ASCEND_TOOLKIT_HOME/python/site-packages:$PYTHONPATH
